// x86's vector instructions. gcc 12 and older take the undefined registers of this header, which its functions
// overwrite, for variables of ours that may be uninitialised (gcc's bug 105593).
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

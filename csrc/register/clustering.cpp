// Clustering, as torch sees it: schemas, argument checks, calls into the code that knows no torch.
#include <numeric>

#include "cpu/clustering/balanced_cpu.h"
#include "cpu/clustering/clustering_cpu.h"
#include "cpu/clustering/unique_cpu.h"
#include "register/tensors.h"

namespace dgi::registration {
namespace {

constexpr const char* kClustering = "dgi_kernels, clustering: ";

template <class Stored>
dgi::cpu::Points<Stored> points_of(const Tensor& x, const std::optional<Tensor>& weights) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), kClustering, "x must be contiguous (N, D)");
  if (weights) {
    STD_TORCH_CHECK(weights->is_contiguous() && weights->scalar_type() == ScalarType::Double
                        && weights->numel() == x.size(0),
                    kClustering, "weights must be contiguous float64 (N,)");
  }
  return {data_of<Stored>(x), weights ? data_of<double>(*weights) : nullptr, x.size(0), x.size(1)};
}

const int64_t* codes_of(const Tensor& codes, int64_t rows, int64_t clusters) {
  STD_TORCH_CHECK(codes.is_contiguous() && codes.scalar_type() == ScalarType::Long && codes.numel() == rows,
                  kClustering, "codes must be contiguous int64 (N,)");
  const int64_t* const code = data_of<int64_t>(codes);
  for (int64_t row = 0; row < rows; ++row) {
    STD_TORCH_CHECK(0 <= code[row] && code[row] < clusters, kClustering, "codes must be in [0, ", clusters, "); got ",
                    code[row]);
  }
  return code;
}

std::tuple<Tensor, Tensor> cluster_sums_cpu(const Tensor& x, const Tensor& codes, const std::optional<Tensor>& weights,
                                            int64_t clusters) {
  STD_TORCH_CHECK(clusters >= 1, kClustering, "clusters must be at least 1; got ", clusters);
  return for_dtype(x, [&](auto stored) -> std::tuple<Tensor, Tensor> {
    const auto points = points_of<decltype(stored)>(x, weights);
    const int64_t* const code = codes_of(codes, points.rows, clusters);
    Tensor sums = torch::stable::empty({clusters, points.dim}, ScalarType::Double);
    Tensor mass = torch::stable::empty({clusters}, ScalarType::Double);
    dgi::cpu::cluster_sums(points, code, clusters, sums.mutable_data_ptr<double>(), mass.mutable_data_ptr<double>());
    return {sums, mass};
  });
}

std::tuple<Tensor, Tensor> cluster_costs_cpu(const Tensor& x, const Tensor& codes, const std::optional<Tensor>& weights,
                                             const Tensor& centroids, int64_t metric, double eps) {
  STD_TORCH_CHECK(0 <= metric && metric < dgi::cpu::kMetrics, kClustering, "metric must be in [0, ", dgi::cpu::kMetrics,
                  "); got ", metric);
  STD_TORCH_CHECK(centroids.dim() == 2 && centroids.is_contiguous() && centroids.scalar_type() == compute_dtype(x)
                      && x.dim() == 2 && centroids.size(1) == x.size(1),
                  kClustering, "centroids must be contiguous (K, D), float32 (float64 for float64 x)");
  return for_dtype(x, [&](auto stored) -> std::tuple<Tensor, Tensor> {
    using Stored = decltype(stored);
    const auto points = points_of<Stored>(x, weights);
    const int64_t* const code = codes_of(codes, points.rows, centroids.size(0));
    Tensor costs = torch::stable::empty({points.rows}, ScalarType::Double);
    Tensor total = torch::stable::empty({}, ScalarType::Double);
    *total.mutable_data_ptr<double>() = dgi::cpu::cluster_costs(points, code, data_of<dgi::Compute<Stored>>(centroids),
                                                                static_cast<dgi::cpu::Metric>(metric), eps,
                                                                costs.mutable_data_ptr<double>());
    return {costs, total};
  });
}

Tensor kmeans_seeds_cpu(const Tensor& x, const std::optional<Tensor>& weights, const Tensor& uniform) {
  STD_TORCH_CHECK(uniform.is_contiguous() && uniform.scalar_type() == ScalarType::Double && uniform.dim() == 2
                      && uniform.size(1) >= 1,
                  kClustering, "uniform must be contiguous float64 (K, trials)");
  Tensor rows = torch::stable::empty({uniform.size(0)}, ScalarType::Long);
  const auto draw = [&](auto real) {
    dgi::cpu::kmeans_seeds(points_of<decltype(real)>(x, weights), data_of<double>(uniform), uniform.size(0),
                           uniform.size(1), rows.mutable_data_ptr<int64_t>());
  };
  STD_TORCH_CHECK(x.scalar_type() == compute_dtype(x), kClustering, "x must be float32 or float64");
  x.scalar_type() == ScalarType::Double ? draw(double{}) : draw(float{});
  return rows;
}

bool bounded_codes_cpu(const Tensor& x, const Tensor& centroids, const std::optional<Tensor>& before, Tensor near,
                       Tensor rest, Tensor codes) {
  const int64_t rows = x.size(0), clusters = centroids.size(0);
  const auto is_like = [&](const Tensor& c) {
    return c.dim() == 2 && c.is_contiguous() && c.scalar_type() == ScalarType::Float && c.size(0) == clusters
           && c.size(1) == x.size(1);
  };
  STD_TORCH_CHECK(x.scalar_type() != ScalarType::Double && x.dim() == 2 && is_like(centroids)
                      && (!before || is_like(*before)) && clusters >= 1,
                  kClustering, "x must be (N, D), not float64, centroids contiguous float32 (K, D), before like them");
  STD_TORCH_CHECK(near.is_contiguous() && near.scalar_type() == ScalarType::Int
                      && near.numel() == rows * dgi::cpu::kNear && rest.is_contiguous()
                      && rest.scalar_type() == ScalarType::Float && rest.numel() == rows && codes.is_contiguous()
                      && codes.scalar_type() == ScalarType::Long && codes.numel() == rows,
                  kClustering, "near must be int32 (N, ", dgi::cpu::kNear, "), rest float32 (N,), codes int64 (N,)");
  const auto find = [&](auto stored) {
    using Stored = decltype(stored);
    return dgi::cpu::bounded_codes<Stored>(points_of<Stored>(x, std::nullopt), data_of<float>(centroids), clusters,
                                           before ? data_of<float>(*before) : nullptr,
                                           {near.mutable_data_ptr<int32_t>(), rest.mutable_data_ptr<float>()},
                                           codes.mutable_data_ptr<int64_t>());
  };
  return x.scalar_type() == ScalarType::BFloat16 ? find(dgi::BFloat16{})
         : x.scalar_type() == ScalarType::Half   ? find(dgi::Float16{})
                                                 : find(float{});
}

// `x` and the codebooks, as clustering takes them besides codes: contiguous, of one dtype, float32 or float64.
void check_vectors(const Tensor& x, const Tensor& codebooks, const std::vector<int64_t>& sizes, int64_t metric) {
  STD_TORCH_CHECK(x.dim() == 2 && codebooks.dim() == 2 && x.is_contiguous() && codebooks.is_contiguous()
                      && x.size(1) == codebooks.size(1) && x.scalar_type() == codebooks.scalar_type()
                      && x.scalar_type() == compute_dtype(x),
                  kClustering, "vectors and codebooks must be contiguous, of one length, float32 or float64 alike");
  for (int64_t size : sizes) STD_TORCH_CHECK(0 < size && size <= INT32_MAX, kClustering, "sizes must be positive");
  STD_TORCH_CHECK(!sizes.empty() && std::accumulate(sizes.begin(), sizes.end(), int64_t{0}) == codebooks.size(0),
                  kClustering, "sizes must add up to the rows of codebooks");
  STD_TORCH_CHECK(0 <= metric && metric < dgi::cpu::kMetrics, kClustering, "metric must be in [0, ", dgi::cpu::kMetrics,
                  "); got ", metric);
}

Tensor unique_codes_cpu(const Tensor& codes, const Tensor& z, const Tensor& codebooks, std::vector<int64_t> sizes,
                        int64_t metric, double eps) {
  check_vectors(z, codebooks, sizes, metric);
  const int64_t rows = z.size(0), levels = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(codes.is_contiguous() && codes.scalar_type() == ScalarType::Long && codes.numel() == rows * levels,
                  kClustering, "codes must be contiguous int64 (N, m)");
  const int64_t* const code = data_of<int64_t>(codes);
  for (int64_t i = 0; i < codes.numel(); ++i) {
    STD_TORCH_CHECK(0 <= code[i] && code[i] < sizes[i % levels], kClustering, "codes must be in their codebooks; got ",
                    code[i]);
  }
  double ids = 1;
  for (int64_t size : sizes) ids *= static_cast<double>(size);
  STD_TORCH_CHECK(ids >= static_cast<double>(rows), kClustering, "there must be as many semantic IDs as rows");
  Tensor out = torch::stable::empty({rows, levels}, ScalarType::Long);
  const auto make = [&](auto real) {
    using Real = decltype(real);
    dgi::cpu::unique_codes<Real>({data_of<Real>(z), data_of<Real>(codebooks), sizes, rows, z.size(1),
                                  static_cast<dgi::cpu::Metric>(metric), eps, code},
                                 out.mutable_data_ptr<int64_t>());
  };
  z.scalar_type() == ScalarType::Double ? make(double{}) : make(float{});
  return out;
}

Tensor balanced_codes_cpu(const Tensor& x, const Tensor& codebook, int64_t metric, double eps, double epsilon,
                          int64_t iterations) {
  check_vectors(x, codebook, {codebook.size(0)}, metric);
  STD_TORCH_CHECK(epsilon > 0 && iterations >= 0, kClustering, "epsilon must be positive, iterations at least 0");
  Tensor codes = torch::stable::empty({x.size(0)}, ScalarType::Long);
  const auto make = [&](auto real) {
    using Real = decltype(real);
    dgi::cpu::Quantize<Real> in{};
    in.z = data_of<Real>(x), in.codebooks = data_of<Real>(codebook), in.sizes = {codebook.size(0)};
    in.rows = x.size(0), in.dim = x.size(1), in.scale = 1, in.tau = 1, in.eps = static_cast<Real>(eps);
    in.mode = dgi::cpu::QuantizeMode::kHard, in.metric = static_cast<dgi::cpu::Metric>(metric);
    dgi::cpu::balanced_codes<Real>(in, epsilon, iterations, codes.mutable_data_ptr<int64_t>());
  };
  x.scalar_type() == ScalarType::Double ? make(double{}) : make(float{});
  return codes;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dgi_kernels, m) {
  m.def("cluster_sums(Tensor x, Tensor codes, Tensor? weights, int clusters) -> (Tensor sums, Tensor mass)");
  m.def("cluster_costs(Tensor x, Tensor codes, Tensor? weights, Tensor centroids, int metric, float eps) -> "
        "(Tensor costs, Tensor total)");
  m.def("unique_codes(Tensor codes, Tensor z, Tensor codebooks, int[] sizes, int metric, float eps) -> Tensor");
  m.def("balanced_codes(Tensor x, Tensor codebook, int metric, float eps, float epsilon, int iterations) -> Tensor");
  m.def("bounded_codes(Tensor x, Tensor centroids, Tensor? before, Tensor(a!) near, Tensor(b!) rest, Tensor(c!) codes) "
        "-> bool");
  m.def("kmeans_seeds(Tensor x, Tensor? weights, Tensor uniform) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dgi_kernels, CPU, m) {
  m.impl("cluster_sums", TORCH_BOX(&cluster_sums_cpu));
  m.impl("cluster_costs", TORCH_BOX(&cluster_costs_cpu));
  m.impl("unique_codes", TORCH_BOX(&unique_codes_cpu));
  m.impl("balanced_codes", TORCH_BOX(&balanced_codes_cpu));
  m.impl("bounded_codes", TORCH_BOX(&bounded_codes_cpu));
  m.impl("kmeans_seeds", TORCH_BOX(&kmeans_seeds_cpu));
}

}  // namespace dgi::registration

"""The model: encoders, residual quantizer, decoders, heads and losses; nothing here trains or searches."""

from dgi.model.dgi_model import DGIModel, DGIOutput, DualEncoder, build_decoder, build_encoder

__all__ = ["DGIModel", "DGIOutput", "DualEncoder", "build_decoder", "build_encoder"]

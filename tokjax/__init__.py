"""tokjax: token reduction for transformers in JAX."""

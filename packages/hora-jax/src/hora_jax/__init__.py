"""HoRA for any JAX pytree and Flax NNX: hypernetwork-shared low-rank adaptation of attention heads."""

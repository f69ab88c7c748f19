"""What a run would cost, from abstract weights: parameters and FLOPs counted, memory as an estimate."""

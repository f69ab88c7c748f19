"""What heads have in common in the gradient, before a method shares anything."""

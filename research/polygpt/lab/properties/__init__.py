"""What holds of every attention variant, a function a property."""

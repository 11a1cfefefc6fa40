"""What happens to images on the device, between the bytes of a batch and the model: pure JAX, inside the jitted step."""

"""Images as bytes, on the host: the tasks, preparing their data, reading it, and the order of examples.

NumPy only. Nothing here imports JAX, so that a process that decodes images can never take a GPU.
"""

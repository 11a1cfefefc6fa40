"""Images as bytes, on the host: what can be learnt (tasks), preparing it, reading it, and in which order.

NumPy only. Nothing here imports JAX, so that a process that decodes images can never take a GPU.
"""

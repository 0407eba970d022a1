"""The search: space, samplers, controller, and the protocol of the executors."""

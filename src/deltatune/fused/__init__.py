"""Adapters on parameters that hold the weights of several experts (`target_parameters`)."""

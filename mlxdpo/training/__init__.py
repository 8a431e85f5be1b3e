"""From a configuration to a tuned adapter."""

"""The Constitution tab."""

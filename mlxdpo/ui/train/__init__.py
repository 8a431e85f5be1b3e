"""The Train tab: a recipe as a form, and the process that runs it."""

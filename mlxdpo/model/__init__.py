"""Models: loading, adapters, the fast way through blocks and head. Nothing here knows rows or objectives."""

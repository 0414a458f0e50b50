"""Static pages, without a build step."""

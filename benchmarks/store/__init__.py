"""Agents on disk: restoring, bytes written, a large home, budgets, and what saving costs."""

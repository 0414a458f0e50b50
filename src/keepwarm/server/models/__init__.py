"""`/v1/models`, in two dialects."""

"""KV and agents on disk: records as checked files, and the budget they are kept within."""

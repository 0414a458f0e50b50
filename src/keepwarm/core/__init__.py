"""Pure decisions and bookkeeping: no thread, clock, file, log or tensor."""

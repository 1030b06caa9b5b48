"""`dreamtune serve`: a server of many adapters of one base, and what it keeps of its requests."""

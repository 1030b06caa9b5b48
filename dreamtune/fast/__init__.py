"""What only makes it faster: without it the numbers stay."""

"""What other voice libraries need for the same work: their own clients in the local Discord, measured as we are."""

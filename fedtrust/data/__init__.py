"""Where the samples come from and how they are spread over the clients."""

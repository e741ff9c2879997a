"""The contract of losses, and losses of K tasks: masked, dense, of tokens."""

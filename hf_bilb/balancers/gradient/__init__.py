"""Methods that look at the gradients of the tasks, one file each."""

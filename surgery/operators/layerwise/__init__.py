"""What operators that solve a layer matrix by matrix share: sums of inputs, factors, the step of a walk."""

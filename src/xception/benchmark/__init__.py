"""Speed, memory and accuracy of inference: ours and each installed engine, side by side in one run."""

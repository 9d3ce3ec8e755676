"""What a run says of itself: metrics, console, pictures, environment, the diagnosis of FP8."""

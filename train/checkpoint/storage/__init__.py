"""Where checkpoints are stored, and the process that writes them; no torch, which takes seconds to
import."""

"""What a run does about hanging ranks and bad numbers: settings, and the heartbeat of a rank."""

"""Token generation: scheduler, model runner with paged attention, executor, sampler."""

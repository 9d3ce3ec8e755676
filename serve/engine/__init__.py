"""From requests to tokens: scheduler, model runner with paged attention, executor, sampler."""

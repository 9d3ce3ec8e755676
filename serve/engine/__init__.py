"""From requests to tokens: scheduler, model runner with paged attention, sampler, detokenizer."""

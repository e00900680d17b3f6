"""Best-of-n and rejection sampling over files: `plaudit bon`.

generate   prompts -> samples, with a local policy or behind an OpenAI-compatible endpoint
score      samples -> the same rows with scores
select     scored rows -> what a trainer reads
report     what choosing the best of n is worth, and what it costs

Every stage reads JSONL and writes JSONL with one line a sample, so that each can be killed, taken up, sharded and
looked at alone.
"""

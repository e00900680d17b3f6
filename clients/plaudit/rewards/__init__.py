"""Rewards put together from a model's score and from what can be verified: `rewards.toml`, served by `plaudit compose`.

reward = sum over the terms of weight * clip(value); `floor` where a required term's value is below its `least`.

A term that cannot be computed (its server is down, a reference is missing) fails its item: there is no reward then,
never a number in its place.
"""

"""Steerable but not decodable: directions that steer a model, read through its own tail."""

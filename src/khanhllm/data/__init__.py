"""Text becomes token ids, ids become shards, shards become batches."""

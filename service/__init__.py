"""The REST API: parse, record, enqueue, answer."""

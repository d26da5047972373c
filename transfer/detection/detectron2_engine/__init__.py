"""The same recipes run by detectron2: its model, data pipeline, optimizer, loop and evaluator."""

"""What runs beside the GPU: jobs of several batches on the ComfyUI of a serverless worker."""

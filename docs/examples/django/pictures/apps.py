from django.apps import AppConfig
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

from comfy_executors import ComfyExecutorsError


class PicturesConfig(AppConfig):
    name = "pictures"

    def ready(self):
        """Read the workflow now: what is wrong with it is told at the start, not to a visitor."""
        from pictures import comfy

        try:
            comfy.template(settings.COMFY_TEMPLATE)
        except (OSError, ComfyExecutorsError) as error:
            raise ImproperlyConfigured(f"COMFY_TEMPLATE: {error}") from error

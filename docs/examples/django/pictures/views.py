import base64
import json
import mimetypes

from django.conf import settings
from django.http import FileResponse, Http404, HttpResponse, JsonResponse, StreamingHttpResponse
from django.shortcuts import get_object_or_404, render
from django.urls import reverse
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from comfy_executors import ComfyExecutorsError, OutputMissingError
from pictures import clients, comfy, jobs
from pictures.answers import answers_errors, describe
from pictures.forms import PictureForm, PicturesForm, cleaned
from pictures.models import Job, Picture


@require_GET
def index(request):
    """A page that shows pictures as they finish."""
    return render(request, "pictures/index.html", {"form": PicturesForm()})


@require_POST
@answers_errors
def image(request):
    """Answer with one image. When the client goes away, it is not made."""
    # Leaving the block cancels what is not done.
    with comfy.submit(**cleaned(PictureForm(request.POST))) as run:
        for result in comfy.follow(run):
            if result is None and clients.is_gone(request):
                return HttpResponse(status=499)  # nobody reads it; nginx's number for it
    if not result.images:
        raise OutputMissingError("the workflow made no image")
    picture = result.images[0]
    response = HttpResponse(picture.data, content_type=type_of(picture))
    response["X-Seed"] = picture.seed
    return response


def type_of(picture):
    """Return an image's MIME type; never Django's default, which is HTML."""
    return mimetypes.guess_type(picture.name)[0] or "application/octet-stream"


@require_POST
@answers_errors
def stream(request):
    """Answer with one line of JSON for each image, as soon as it is there."""
    images = ImageStream(**cleaned(PicturesForm(request.POST)))
    response = StreamingHttpResponse(images, content_type="application/x-ndjson")
    response["X-Accel-Buffering"] = "no"  # nginx passes each line on at once
    response["Cache-Control"] = "no-store"
    return response


class ImageStream:
    """The lines of a stream. Closing it, as gunicorn does when the client is gone, cancels the run.

    A class and no generator function: a generator that was never begun runs no `finally`.
    """

    def __init__(self, **options):
        self._step = None
        self._run = comfy.submit(on_progress=self._note, **options)

    def __iter__(self):
        count = 0
        try:
            for result in comfy.follow(self._run):
                if result is None:
                    # Also to find out whether the client is there: writing fails otherwise.
                    yield _line("progress", step=self._step)
                    continue
                for picture in result.images:
                    count += 1
                    yield _line("image", **_as_json(picture))
        except ComfyExecutorsError as error:  # too late for another status
            status, sentence = describe(error)
            yield _line("error", status=status, error=sentence)
        yield _line("end", images=count)

    def close(self):
        self._run.cancel()  # without effect on one that is done

    def _note(self, event):
        if event.kind == "step":
            self._step = [event.step, event.max]


def _line(kind, **facts):
    return json.dumps({"kind": kind, **facts}) + "\n"


def _as_json(picture):
    return {
        "type": type_of(picture),
        "seed": picture.seed,
        "data": base64.b64encode(picture.data).decode(),
    }


@require_POST
@answers_errors
def start_job(request):
    """Answer 202 at once, with the address where the state of the job stands."""
    job_id = jobs.start(**cleaned(PicturesForm(request.POST))).id
    status_url = reverse("job", args=[job_id])
    return JsonResponse(
        {"status_url": status_url}, status=202, headers={"Location": status_url, "Retry-After": "1"}
    )


@require_http_methods(["GET", "DELETE"])
def job(request, job_id):
    """Tell how far a job is; DELETE cancels it. Any process can answer."""
    if request.method == "DELETE":
        jobs.cancel(job_id)
    found = get_object_or_404(Job, pk=job_id)
    return JsonResponse(
        {
            "state": found.present_state,
            "error": found.error,
            "num_samples": found.num_samples,
            "images": [
                {"url": reverse("picture", args=[job_id, picture.id]), "seed": picture.seed}
                for picture in found.pictures.order_by("id")
            ],
        }
    )


@require_GET
def picture(request, job_id, picture_id):
    """Answer with one image of a job."""
    found = get_object_or_404(Picture, pk=picture_id, job_id=job_id)
    try:
        return FileResponse(open(settings.MEDIA_ROOT / found.file, "rb"))  # which closes it
    except FileNotFoundError as error:
        raise Http404("this picture is gone") from error

from django.urls import path

from pictures import views

urlpatterns = [
    path("", views.index, name="index"),
    path("image", views.image, name="image"),
    path("stream", views.stream, name="stream"),
    path("jobs", views.start_job, name="jobs"),
    path("jobs/<uuid:job_id>", views.job, name="job"),
    path("jobs/<uuid:job_id>/pictures/<int:picture_id>", views.picture, name="picture"),
]

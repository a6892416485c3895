from django import forms


class PictureForm(forms.Form):
    """What a client may say; everything else of the workflow is ours."""

    prompt = forms.CharField(max_length=2000, widget=forms.Textarea(attrs={"rows": 2}))
    steps = forms.IntegerField(min_value=1, max_value=50, initial=20)
    seed = forms.IntegerField(min_value=0, max_value=2**32 - 1, required=False)


class PicturesForm(PictureForm):
    """The same for several pictures."""

    num_samples = forms.IntegerField(min_value=1, max_value=16, initial=6, label="Pictures")


def cleaned(form):
    """Return what is in a form.

    Raises:
        ValidationError: Something in it is wrong; each field has its messages.
    """
    if not form.is_valid():
        raise forms.ValidationError(form.errors.as_data())
    return form.cleaned_data

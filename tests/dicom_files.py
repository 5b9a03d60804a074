# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""DICOM files of a patient with a name, for tests. Needs pydicom."""

import numpy as np
import pydicom


CT = {"Modality": "CT", "RescaleSlope": 1, "RescaleIntercept": -1024}


def save_dicom(path, values: np.ndarray, photometric="MONOCHROME2", **tags):
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = pydicom.uid.CTImageStorage, "1.2.3"
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = pydicom.uid.CTImageStorage, "1.2.3"
    data.PatientName, data.PatientID = "Doe^Jane", "4711-SECRET"
    bits = values.dtype.itemsize * 8
    data.BitsAllocated = data.BitsStored = bits
    data.HighBit, data.PixelRepresentation = bits - 1, int(values.dtype.kind == "i")
    frames = int(tags.get("NumberOfFrames", 1))
    data.Rows, data.Columns = values.shape[1:3] if frames > 1 else values.shape[:2]
    data.SamplesPerPixel, data.PhotometricInterpretation = (3 if values.shape[-1] == 3 else 1), photometric
    if data.SamplesPerPixel == 3:
        data.PlanarConfiguration = 0
    data.PixelData = values.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


def save_ct(path, hounsfield, **tags):
    return save_dicom(path, (np.asarray(hounsfield) + 1024).astype(np.uint16), **CT | tags)

package org.mobilemm

import org.junit.Assert.assertEquals
import org.junit.Assert.assertTrue
import org.junit.Test
import java.io.File

class BackendTest {
    @Test fun `a bundle for a runtime that is not linked is told in one line`() {
        val bundle = Bundle.open(File(Vectors.drawingFolder, "drawer-executorch"))
        val error = runCatching { Backend.open(bundle) }.exceptionOrNull()
        assertTrue("$error", error is MobileMMError)
        val wanted = "${bundle.folder}: this app runs bundles for onnx, this one is for executorch: export the model with --target onnx"
        assertEquals(wanted, error!!.message)
    }
}

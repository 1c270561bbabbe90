package org.mobilemm

import org.junit.Assert.assertEquals
import org.junit.Assert.assertFalse
import org.junit.Assert.assertTrue
import org.junit.Test
import java.io.File

class HostileBundleTest {
    @Test fun `manifests are read or refused as in Python`() {
        val cases = Vectors.objects("manifests.json")
        assertTrue(cases.size >= 25)
        for (case in cases) {
            val found = runCatching { ManifestReader.parse(Vectors.file("manifests/${case.text("file")}").readBytes(), "manifest.json") }
            assertEquals("${case["file"]} ${found.exceptionOrNull()?.message}", case["read"], found.isSuccess)
            if (found.isFailure) assertOneLine(found.exceptionOrNull()!!, "manifest.json")
        }
    }

    /**
     * Of bundles that Python refuses: what is wrong with files and manifests is told before anything is computed. What
     * is wrong inside of a graph whose hashes hold is the runtime's to tell; it must end in one line as well.
     */
    @Test fun `a thousand damaged bundles end in one line each`() {
        val cases = Vectors.objects("damaged.json")
        assertTrue(cases.size >= 990)
        val before = Vectors.folder.walk().maxDepth(2).map { it.path }.toSet()
        var ran = 0
        for (case in cases) {
            val folder = Vectors.file(case.text("folder"))
            val damage = case.text("damage")
            val error = runCatching { Bundle.open(folder) }.exceptionOrNull()
            if (error != null) {
                assertOneLine(error, folder.path)
                continue
            }
            val failure = runCatching { answer(folder) }.exceptionOrNull()
            if (failure != null) {
                assertOneLine(failure, folder.path)
            } else {
                assertTrue("$damage was not refused: ${case["told"]}", damage in INSIDE_GRAPHS)
                ran++
            }
        }
        assertEquals(before, Vectors.folder.walk().maxDepth(2).map { it.path }.toSet())
        println("${cases.size} damaged bundles, of which $ran answered all the same")
    }

    @Test fun `the whole one that they were made of answers`() {
        val folder = Vectors.file("tiny-onnx")
        Bundle.open(folder)
        assertTrue(runCatching { answer(folder) }.isSuccess)
    }

    @Test fun `a folder that is none, and one without a manifest, are told apart`() {
        val nowhere = File(Vectors.folder, "nowhere")
        assertOneLine(runCatching { Bundle.open(nowhere) }.exceptionOrNull()!!, nowhere.path)
        val error = runCatching { Bundle.open(Vectors.file("images")) }.exceptionOrNull()!!
        assertTrue(error.message!!, "is no bundle" in error.message!!)
    }

    private fun answer(folder: File): String {
        val bundle = Bundle.open(folder, verify = false)
        OnnxBackend(bundle, threads = 1).use { backend ->
            Session(bundle, backend, Sampling(maxNewTokens = 3)).use { session ->
                session.lookAt(PixelRaster(4, 4, IntArray(16) { it * 0x0f0f0f }))
                return session.reply("abc")
            }
        }
    }

    private fun assertOneLine(
        error: Throwable,
        where: String,
    ) {
        assertTrue("$error", error is MobileMMError)
        val message = error.message!!
        assertFalse(message, message.any { it < ' ' || it == '\u007f' })
        assertTrue(message, where in message)
        assertTrue(message, message.length - where.length < 400)
    }

    private companion object {
        /** Damages that leave files, sizes, hashes and manifest in agreement. */
        val INSIDE_GRAPHS =
            setOf(
                "spoil_values",
                "spoil_hidden_values",
                "misplace",
                "misshape",
                "retype",
                "misfit_quantized",
                "change_operators",
                "change_interface",
                "spoil_protobuf",
            )
    }
}

package org.mobilemm

import org.junit.Assert.assertEquals
import org.junit.Assert.assertFalse
import org.junit.Assert.assertNotEquals
import org.junit.Assert.assertTrue
import org.junit.Test
import java.io.File

/** A tiny model that draws, and the default one where it does, against what Python's session drew with them. */
class DrawingTest {
    private val folder = Vectors.drawingFolder
    private val tiny by lazy { Bundle.open(File(folder, "drawer-onnx")) }
    private val cases by lazy { cases(folder) }

    private fun <T> tiny(action: (Watched) -> T): T = Watched(OnnxBackend(tiny, threads = 1)).use(action)

    /** A backend that notes what is asked of it. */
    private class Watched(private val backend: Backend) : Backend by backend {
        val calls = ArrayList<String>()
        var before: (String) -> Unit = {}

        override fun load(part: String) {
            calls += "load $part"
            backend.load(part)
        }

        override fun release(part: String) {
            calls += "release $part"
            backend.release(part)
        }

        override fun run(
            part: String,
            inputs: Map<String, Tensor>,
        ): Map<String, Tensor> {
            calls += "run $part"
            before(part)
            return backend.run(part, inputs)
        }

        override fun decoder(): Decoder {
            calls += "decoder"
            return backend.decoder()
        }
    }

    @Test fun `the same picture for a seed as in Python`() {
        assertTrue(cases.size >= 2)
        assertNotEquals(File(folder, cases[0].text("file")).readBytes().toList(), File(folder, cases[1].text("file")).readBytes().toList())
        tiny { drawsAsPython(tiny, it, folder) }
    }

    @Test fun `step by step the same sketches and picture as in Python, in any of its numbers of steps`() {
        val steps = File(folder, "stepwise")
        val bundle = Bundle.open(File(steps, "drawer-onnx"))
        Watched(OnnxBackend(bundle, threads = 1)).use { backend ->
            drawsAsPython(bundle, backend, steps, sketches = 3)
            Session(bundle, backend, sampling(cases[0]), steps = 2).use { it.reply(cases[0].text("question")) }
            assertEquals(
                listOf("output_projector", "denoiser", "denoiser", "image_decoder").map { "run $it" },
                backend.calls.filter { it.startsWith("run") && it != "run embed" }.takeLast(4),
            )
            val refused = runCatching { Session(bundle, backend, steps = 3) }.exceptionOrNull()
            assertTrue("$refused", refused is MobileMMError && "draws in 1, 2, 4: export it" in refused.message!!)
        }
        val text = File(bundle.folder, Bundle.MANIFEST).readText()
        for ((old, new) in listOf("\"steps\": 4" to "\"steps\": 3", "\"scales\"" to "\"scale\"", "\"next_latents\"" to "\"latents\"")) {
            val error = runCatching { ManifestReader.parse(text.replace(old, new).toByteArray(), "manifest.json") }.exceptionOrNull()
            assertTrue("$old: $error", error is MobileMMError)
        }
    }

    @Test fun `the default model draws as in Python, too, if it draws`() {
        assertEquals(Vectors.bundle.manifest.generation != null, Vectors.file("drawings").isDirectory)
        if (Vectors.bundle.manifest.generation != null) drawsAsPython(Vectors.bundle, Vectors.backend, Vectors.file("drawings"))
    }

    @Test fun `without a seed each picture is another, and its seed draws it again`() {
        tiny { backend ->
            fun drawn(seed: Long?) =
                Session(tiny, backend, Sampling(maxNewTokens = 4, seed = seed)).use { session ->
                    val pieces = ArrayList<Piece>()
                    session.stream(cases[0].text("question")) { pieces += it }
                    pieces.filterIsInstance<Drawn>().single()
                }
            val one = drawn(null)
            assertNotEquals(one.seed, drawn(null).seed)
            assertTrue(one.seed <= UInt.MAX_VALUE.toULong())
            val again = drawn(one.seed.toLong())
            assertEquals(one.seed, again.seed)
            assertEquals(pixels(one.picture), pixels(again.picture))
        }
    }

    private fun pixels(picture: PixelRaster) =
        (0 until picture.height).flatMap { y -> IntArray(picture.width).also { picture.row(y, it) }.toList() }

    @Test fun `a drawing is remembered, and the cache holds it`() {
        tiny { backend ->
            val case = cases[0]
            val (known, more) =
                Session(tiny, backend, sampling(case)).use { session ->
                    session.reply(case.text("question"))
                    session.messages.toList() to session.reply("What")
                }
            Session(tiny, backend, sampling(case)).use { session ->
                session.restore(known)
                assertEquals(more, session.reply("What"))
            }
            Session(tiny, backend, sampling(case)).use { session ->
                session.reply(case.text("question"))
                val read = session.stats!!.promptTokens
                session.reply("What")
                assertTrue("${session.stats!!.cachedTokens} of $read", session.stats!!.cachedTokens >= read)
            }
        }
    }

    @Test fun `a stop between the parts that draw ends the answer, and the next one draws`() {
        for (part in listOf("output_projector", "generator")) {
            tiny { backend ->
                val case = cases[0]
                Session(tiny, backend, sampling(case)).use { session ->
                    backend.before = { if (it == part) session.cancel() }
                    val pieces = ArrayList<Piece>()
                    val said = session.stream(case.text("question")) { pieces += it }
                    assertTrue(pieces.last() is Drawing)
                    assertEquals(said, pieces.joinToString("") { it.text })
                    assertEquals(if (said.isEmpty()) 0 else 2, session.messages.size)
                    if (said.isNotEmpty()) assertEquals(said, session.messages.last().text)
                    backend.before = {}
                    session.reset()
                    assertEquals(case.text("text"), session.stream(case.text("question")) { pieces += it })
                    assertTrue(pieces.any { it is Drawn })
                }
            }
        }
    }

    @Test fun `memory is given back when there is little, and each part loaded when it is needed`() {
        val question = cases[0].text("question")
        tiny { backend ->
            Session(tiny, backend, sampling(cases[0]), keepVision = false).use { session ->
                session.reply(question)
                val drawing = backend.calls.dropWhile { it != "run output_projector" }
                assertEquals(
                    listOf("run output_projector", "run generator", "release output_projector", "release generator"),
                    drawing.take(4),
                )
                assertFalse("run vision" in backend.calls)
            }
        }
        tiny { backend ->
            Session(tiny, backend, sampling(cases[0]), keepVision = true).use { session ->
                session.reply(question)
                assertFalse(backend.calls.any { it.startsWith("release") })
                session.release()
                assertEquals(listOf("vision", "output_projector", "generator").map { "release $it" }, backend.calls.takeLast(3))
            }
        }
    }

    @Test fun `a picture is looked at before the decoder is loaded`() {
        for (keep in listOf(true, false)) {
            tiny { backend ->
                Session(tiny, backend, Sampling(maxNewTokens = 1), keepVision = keep).use { session ->
                    session.lookAt(PixelRaster(4, 4, IntArray(16) { it * 0x0f0f0f }))
                    session.reply("What is this")
                    val seen = listOf("load vision", "run vision") + (if (keep) listOf() else listOf("release vision"))
                    assertEquals(seen + listOf("load embed", "decoder", "run embed"), backend.calls.take(seen.size + 3))
                    // What was seen is known, and the part need not come back for it.
                    backend.calls.clear()
                    session.reply("Why")
                    assertFalse("load vision" in backend.calls)
                }
            }
        }
    }

    @Test fun `what is warmed is loaded before the question, and never together where memory is short`() {
        for (keep in listOf(true, false)) {
            tiny { backend ->
                Session(tiny, backend, Sampling(maxNewTokens = 1), keepVision = keep).use { session ->
                    session.warm()
                    assertEquals(if (keep) listOf("load vision", "load embed", "decoder") else listOf(), backend.calls)
                    session.reply("What is this")
                    assertEquals(1, backend.calls.count { it == "decoder" })
                }
            }
        }
    }

    @Test fun `manifests of drawing bundles are refused as in Python`() {
        val text = File(tiny.folder, Bundle.MANIFEST).readText()
        assertEquals(4, ManifestReader.parse(text.toByteArray(), "manifest.json").generation!!.steps)
        for (case in Vectors.objects("drawing_manifests.json")) {
            val error = runCatching { ManifestReader.parse(Vectors.file(case.text("file")).readBytes(), "manifest.json") }.exceptionOrNull()
            assertEquals("${case["file"]} $error", case["refused"], error is MobileMMError)
            assertFalse("$error", error?.message.orEmpty().any { it < ' ' })
            // Python names no key where its reader of JSON gives up.
            if (case["key"] == null) continue
            assertEquals("${case["file"]} $error", case["key"], error?.message?.let { Regex("key ['\"]([^'\"]*)['\"]").find(it)?.groupValues?.get(1) })
        }
    }

    @Test fun `the golden check holds for the parts that draw`() {
        val checks = tiny { SelfCheck(tiny, it) { file -> Vectors.picture(file) }.run() }
        assertTrue(checks.map { it.part }.containsAll(listOf("output_projector", "generator")))
        checks.forEach { assertTrue(it.toString(), it.passed) }
    }
}

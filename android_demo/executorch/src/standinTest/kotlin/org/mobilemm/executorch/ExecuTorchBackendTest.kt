package org.mobilemm.executorch

import org.junit.After
import org.junit.Assert.assertEquals
import org.junit.Assert.assertFalse
import org.junit.Assert.assertTrue
import org.junit.Test
import org.mobilemm.Backend
import org.mobilemm.Benchmark
import org.mobilemm.BenchmarkSettings
import org.mobilemm.Bundle
import org.mobilemm.Cancelled
import org.mobilemm.Computer
import org.mobilemm.Drawing
import org.mobilemm.Drawn
import org.mobilemm.MobileMMError
import org.mobilemm.OnnxBackend
import org.mobilemm.Piece
import org.mobilemm.PixelRaster
import org.mobilemm.Sampling
import org.mobilemm.SelfCheck
import org.mobilemm.Session
import org.mobilemm.Sketch
import org.mobilemm.Tensor
import org.mobilemm.Vectors
import org.mobilemm.cases
import org.mobilemm.sampling
import org.mobilemm.text
import org.pytorch.executorch.PythonRuntime
import java.io.File
import java.nio.file.Files

/** What [ExecuTorchBackend] does beside answering: stops, gives memory back, and tells what is wrong. */
class ExecuTorchBackendTest {
    private val whole = File(Vectors.drawingFolder, "drawer-executorch")
    private val steps = File(Vectors.drawingFolder, "stepwise/stepwise-executorch")
    private val bundle by lazy { Bundle.open(whole) }
    private val drawing by lazy { cases(Vectors.drawingFolder)[0] }
    private val folders = ArrayList<File>()

    private fun <T> backend(action: (ExecuTorchBackend) -> T): T = ExecuTorchBackend(bundle, threads = 1).use(action)

    /** An opened bundle whose program is changed behind the checks. */
    private fun changed(change: (File) -> Unit): Bundle {
        val copy = Files.createTempDirectory("bundle").toFile().also { folders += it }
        whole.copyRecursively(copy, overwrite = true)
        return Bundle.open(copy).also { change(it.partFile("decoder")) }
    }

    private fun refused(action: () -> Unit): String {
        val error = runCatching(action).exceptionOrNull()
        assertTrue("$error", error is MobileMMError && error !is Cancelled)
        assertFalse("$error", '\n' in error!!.message!!)
        return error.message!!
    }

    @After fun `nothing is left behind`() {
        assertEquals(0, PythonRuntime.programs)
        assertEquals(0L, ProcessHandle.current().children().count())
        folders.forEach { it.deleteRecursively() }
    }

    @Test fun `a bundle's target chooses what runs it`() {
        Backend.open(bundle).use { assertTrue("$it", it is ExecuTorchBackend) }
        Backend.open(Bundle.open(File(Vectors.drawingFolder, "drawer-onnx"))).use { assertTrue("$it", it is OnnxBackend) }
    }

    @Test fun `a stop ends an answer between two calls, and the conversation goes on`() =
        backend { backend ->
            Session(bundle, backend, Sampling(maxNewTokens = 20)).use { session ->
                val question = "is in picture What"
                val all = session.reply(question)
                val ids = session.answerIds.toList()
                assertTrue("$ids", ids.size > 6)
                session.reset()
                val said = session.stream(question) { if (session.answerIds.size >= 3) session.cancel() }
                assertTrue("$said of $all", all.startsWith(said) && session.answerIds.size < ids.size)
                assertTrue(runCatching { backend.run("embed", mapOf()) }.exceptionOrNull() is MobileMMError)
                session.reset()
                assertEquals(all, session.reply(question))
                assertEquals(ids, session.answerIds)
            }
        }

    @Test fun `a stop between the steps of a drawing ends it, and the next one is drawn`() {
        val bundle = Bundle.open(steps)
        ExecuTorchBackend(bundle, threads = 1).use { backend ->
            Session(bundle, backend, sampling(drawing), sketches = true).use { session ->
                val pieces = ArrayList<Piece>()
                session.stream(drawing.text("question")) {
                    pieces += it
                    if (it is Sketch && it.step == 2) session.cancel()
                }
                assertEquals(listOf(1, 2), pieces.filterIsInstance<Sketch>().map { it.step })
                assertFalse(pieces.any { it is Drawn })
                assertTrue(pieces.any { it is Drawing })
                session.reset()
                session.stream(drawing.text("question")) { pieces += it }
                assertTrue(pieces.last { it !is org.mobilemm.Words } is Drawn)
            }
        }
    }

    @Test fun `each part has a program that is given back, each decoder one of its own`() =
        backend { backend ->
            assertEquals(0, PythonRuntime.programs)
            backend.load("vision")
            backend.load("vision")
            backend.load("embed")
            assertEquals(2, PythonRuntime.programs)
            val (one, other) = backend.decoder() to backend.decoder()
            assertEquals(4, PythonRuntime.programs)
            val embeds = Tensor.ofFloats(FloatArray(3 * bundle.manifest.model.hiddenSize) { it / 100f }, 1, 3, bundle.manifest.model.hiddenSize.toLong())
            val first = one.decode(embeds, null).let { logits -> List(8) { logits.get(it) } }
            assertEquals(listOf(3, 0), listOf(one.length, other.length))
            // The other's keys and values are its own, and what is cut away does not count.
            assertEquals(first, other.decode(embeds, null).let { logits -> List(8) { logits.get(it) } })
            one.decode(embeds, null)
            one.truncate(0)
            assertEquals(first, one.decode(embeds, null).let { logits -> List(8) { logits.get(it) } })
            val context = bundle.manifest.model.contextLength.toLong()
            val long = Tensor.of("float32", 1, context, bundle.manifest.model.hiddenSize.toLong())
            val message = refused { one.decode(long, null) }
            assertTrue(message, "are more than this model's context of $context" in message)
            assertEquals(3, one.length)
            one.close()
            other.close()
            backend.release("vision")
            assertEquals(1, PythonRuntime.programs)
        }

    @Test fun `pictures are looked at one by one, and tensors of other shapes or types are refused`() =
        backend { backend ->
            val rule = bundle.manifest.image!!
            val two = Tensor.of("uint8", 2, 3, rule.height.toLong(), rule.width.toLong())
            val bytes = two.view()
            while (bytes.hasRemaining()) bytes.put((bytes.position() % 251).toByte())
            val both = backend.run("vision", mapOf("pixels" to two)).getValue("image_features")
            val second = backend.run("vision", mapOf("pixels" to two.slice(0, 1, 2))).getValue("image_features")
            assertEquals(listOf(2 * bundle.manifest.model.numImageTokens.toLong(), bundle.manifest.model.hiddenSize.toLong()), both.shape)
            assertEquals(second.view(), both.slice(0, bundle.manifest.model.numImageTokens, both.shape[0].toInt()).view())
            for ((wrong, said) in listOf(
                Tensor.of("uint8", 1, 3, 8, 8) to "has uint8 [1, 3, 8, 8] as input, where the manifest has 'image'",
                Tensor.of("float32", 1, 3, rule.height.toLong(), rule.width.toLong()) to "has float32",
            )) {
                val message = refused { backend.run("vision", mapOf("pixels" to wrong)) }
                assertTrue(message, said in message)
            }
            val message = refused { backend.run("generator", mapOf()) }
            assertTrue(message, "part 'generator' was given no condition" in message)
        }

    @Test fun `a program that is cut, lost, another one or none is told in one line`() {
        val cut = changed { it.writeBytes(it.readBytes().let { bytes -> bytes.copyOf(bytes.size / 2) }) }
        for (part in listOf("vision", "embed", "output_projector", "generator")) {
            val message = refused { ExecuTorchBackend(cut).use { it.load(part) } }
            assertTrue(message, "model.pte: method " in message && "cannot be loaded by ExecuTorch" in message)
        }
        refused { ExecuTorchBackend(cut).use { it.decoder() } }
        for (change in listOf<(File) -> Unit>({ it.delete() }, { it.writeText("no program") }, { it.writeBytes(ByteArray(0)) })) {
            refused { ExecuTorchBackend(changed(change)).use { it.load("embed") } }
        }
        val other = changed { Bundle.open(steps).partFile("decoder").copyTo(it, overwrite = true) }
        ExecuTorchBackend(other).use { backend ->
            val message = refused { backend.load("generator") }
            assertTrue(message, "method 'generator' is not in the program" in message)
            backend.load("embed")
            // What has failed to load may be loaded when it is mended.
            bundle.partFile("decoder").copyTo(other.partFile("decoder"), overwrite = true)
            backend.load("generator")
        }
        // Before a runtime sees them, the bundle's own check does.
        assertTrue("damaged or changed" in refused { Bundle.open(changed { it.writeBytes(it.readBytes().also { bytes -> bytes[bytes.size / 2]++ }) }.folder) })
    }

    @Test fun `the golden check tells which part was changed`() =
        backend { backend ->
            val changed =
                object : Backend by backend {
                    override fun run(
                        part: String,
                        inputs: Map<String, Tensor>,
                    ) = backend.run(part, inputs).onEach { (_, tensor) ->
                        if (part == "vision") tensor.floats().let { floats -> repeat(floats.limit()) { floats.put(it, floats.get(it) * 1.1f) } }
                    }
                }
            val failed = SelfCheck(bundle, changed) { Vectors.picture(it) }.run().filter { !it.passed }
            assertEquals(listOf("vision"), failed.map { it.part })
        }

    @Test fun `a benchmark measures it`() {
        val settings = BenchmarkSettings(promptTokens = 8, newTokens = 4, runs = 2, threads = 1)
        val benchmark = Benchmark(Bundle.open(steps), settings, Computer())
        assertEquals("ExecuTorch", benchmark.run()["runtime"])
        val figures = benchmark.found.associateBy { it.name }
        for (name in listOf("load_warm", "image", "vision", "ttft", "pp8", "tg4", "token", "draw", "draw_step")) {
            assertTrue(name, figures.getValue(name).runs.all { it > 0 })
        }
        assertEquals(2 * 4, figures.getValue("draw_step").runs.size)
    }

    @Test fun `a session that looks gives its parts back where memory is short`() =
        backend { backend ->
            Session(bundle, backend, Sampling(maxNewTokens = 1), keepVision = false).use { session ->
                session.lookAt(PixelRaster(4, 4, IntArray(16) { it * 0x0f0f0f }))
                session.reply("What is this")
                // The embedding and the decoder.
                assertEquals(2, PythonRuntime.programs)
                session.release()
                assertEquals(1, PythonRuntime.programs)
            }
        }
}

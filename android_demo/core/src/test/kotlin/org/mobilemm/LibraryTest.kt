package org.mobilemm

import com.sun.net.httpserver.HttpExchange
import com.sun.net.httpserver.HttpServer
import org.junit.After
import org.junit.Assert.assertEquals
import org.junit.Assert.assertFalse
import org.junit.Assert.assertTrue
import org.junit.Before
import org.junit.Rule
import org.junit.Test
import org.junit.rules.TemporaryFolder
import java.io.ByteArrayOutputStream
import java.io.File
import java.net.InetAddress
import java.net.InetSocketAddress
import java.util.Random
import java.util.zip.ZipEntry
import java.util.zip.ZipOutputStream

class LibraryTest {
    @get:Rule val temporary = TemporaryFolder()
    private val source = Vectors.file("tiny-onnx")
    private lateinit var server: HttpServer
    private lateinit var library: Library

    /** How many bytes of all answers together are sent before the connection breaks off. */
    private var budget = Long.MAX_VALUE
    private var ranges = true
    private var served = 0L

    @Before fun serve() {
        library = Library(File(temporary.root, "models"))
        server = HttpServer.create(InetSocketAddress(InetAddress.getLoopbackAddress(), 0), 0)
        server.createContext("/") { exchange -> answer(exchange) }
        server.start()
    }

    @After fun stop() = server.stop(0)

    private val link get() = "http://127.0.0.1:${server.address.port}/tiny-onnx"

    private fun answer(exchange: HttpExchange) {
        val file = File(source, exchange.requestURI.path.removePrefix("/tiny-onnx/"))
        if (!file.isFile) {
            exchange.sendResponseHeaders(404, -1)
            return exchange.close()
        }
        val bytes = file.readBytes()
        val from = if (ranges) exchange.requestHeaders.getFirst("Range")?.removePrefix("bytes=")?.removeSuffix("-")?.toInt() ?: 0 else 0
        if (from > 0) exchange.responseHeaders.add("Content-Range", "bytes $from-${bytes.size - 1}/${bytes.size}")
        exchange.sendResponseHeaders(if (from > 0) 206 else 200, (bytes.size - from).toLong().let { if (it == 0L) -1 else it })
        val sent = minOf((bytes.size - from).toLong(), budget).toInt()
        if (file.name != Bundle.MANIFEST) {
            budget -= sent
            served += sent
            exchange.responseBody.write(bytes, from, sent)
        } else {
            exchange.responseBody.write(bytes)
        }
        // A body shorter than announced ends the connection.
        runCatching { exchange.close() }
    }

    @Test fun `a download that is cut anywhere goes on and ends whole`() {
        val total = Bundle.open(source).manifest.files.sumOf { it.bytes }
        val draw = Random(1)
        val cuts = (0L..40L) + (total - 3..total) + List(60) { draw.nextInt(total.toInt()).toLong() }
        for (cut in cuts) {
            budget = cut
            served = 0
            val first = runCatching { library.download(link) }
            if (first.isFailure) {
                val message = first.exceptionOrNull()!!.message!!
                assertTrue(message, "goes on where it stopped" in message)
                assertEquals(emptyList<String>(), library.names())
                budget = Long.MAX_VALUE
                library.download(link)
            }
            assertEquals("cut at $cut", listOf("tiny-onnx"), library.names())
            Bundle.open(library.folder("tiny-onnx"))
            assertEquals("cut at $cut: nothing was fetched twice", total, served)
            library.delete("tiny-onnx")
        }
    }

    @Test fun `a server that cannot resume sends the file again`() {
        ranges = false
        budget = 3000
        assertTrue(runCatching { library.download(link) }.isFailure)
        budget = Long.MAX_VALUE
        Bundle.open(library.download(link).folder)
    }

    @Test fun `what was damaged underway is told and fetched anew`() {
        budget = Bundle.open(source).manifest.files.sumOf { it.bytes } * 2 / 3
        assertTrue(runCatching { library.download(link) }.isFailure)
        val draft = File(library.folder, ".tiny-onnx.part")
        val file = draft.walk().filter { it.isFile && it.name != Bundle.MANIFEST }.maxByOrNull { it.length() }!!
        val bytes = file.readBytes()
        bytes[0] = (bytes[0] + 1).toByte()
        file.writeBytes(bytes)
        budget = Long.MAX_VALUE
        val error = runCatching { library.download(link) }.exceptionOrNull()!!
        assertTrue(error.message!!, "SHA-256" in error.message!!)
        Bundle.open(library.download(link).folder)
    }

    @Test fun `what the server does not have is told in one line`() {
        for (wrong in listOf("$link/nothing", "ftp://somewhere/x", "tiny", "")) {
            val error = runCatching { library.download(wrong) }.exceptionOrNull()
            assertTrue("$wrong: $error", error is MobileMMError && '\n' !in error.message!!)
        }
    }

    @Test fun `a download that is stopped is kept`() {
        assertTrue(runCatching { library.download(link, cancelled = { true }) }.exceptionOrNull() is Cancelled)
        library.download(link)
        assertEquals(listOf("tiny-onnx"), library.names())
    }

    private fun zip(
        files: Map<String, ByteArray>,
    ) = ByteArrayOutputStream().also { out ->
        ZipOutputStream(out).use { zip ->
            for ((name, bytes) in files) {
                zip.putNextEntry(ZipEntry(name))
                zip.write(bytes)
                zip.closeEntry()
            }
        }
    }.toByteArray()

    private fun files(prefix: String = "") =
        source.walk().filter { it.isFile }.associate { prefix + it.relativeTo(source).path to it.readBytes() }

    @Test fun `zips of the folder and of what is in it are imported`() {
        for (prefix in listOf("", "tiny-onnx/", "a/")) {
            val bundle = library.importZip(zip(files(prefix)).inputStream(), "mine")
            assertEquals("tiny", bundle.manifest.model.name)
            library.delete("mine")
        }
    }

    @Test fun `hostile and damaged zips leave nothing behind`() {
        val whole = zip(files())
        val hostile =
            listOf(
                zip(files() + ("../evil" to byteArrayOf(1))),
                zip(files() + ("parts/../../evil" to byteArrayOf(1))),
                zip(files() + ("/evil" to byteArrayOf(1))),
                zip(files() + ("parts\\evil" to byteArrayOf(1))),
                zip(files() + ("extra.json" to byteArrayOf(1))),
                zip(files() - "tokenizer.json"),
                zip(files() - "manifest.json"),
                zip(files() + ("tokenizer.json" to byteArrayOf(1))),
                zip(emptyMap()),
                ByteArray(0),
                ByteArray(1000) { it.toByte() },
                whole.copyOf(whole.size / 2),
                whole.copyOf().also { it[whole.size / 3] = (it[whole.size / 3] + 1).toByte() },
            )
        for ((index, bytes) in hostile.withIndex()) {
            val error = runCatching { library.importZip(bytes.inputStream(), "mine") }.exceptionOrNull()
            assertTrue("$index: $error", error is MobileMMError && '\n' !in error.message!!)
            assertEquals(emptyList<String>(), library.names())
            assertFalse(File(library.folder, ".mine.part").exists())
        }
        assertFalse(temporary.root.walk().any { it.name.contains("evil") })
    }

    @Test fun `names lead nowhere else`() {
        for (name in listOf("..", "a/b", "", ".hidden", "a b")) {
            assertTrue(name, runCatching { library.delete(name) }.exceptionOrNull() is MobileMMError)
        }
    }
}

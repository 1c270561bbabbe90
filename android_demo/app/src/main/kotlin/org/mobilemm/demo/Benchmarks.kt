package org.mobilemm.demo

import android.app.ActivityManager
import android.content.Context
import android.graphics.Bitmap
import android.os.Build
import android.os.Handler
import android.os.Looper
import android.util.Log
import org.mobilemm.Benchmark
import org.mobilemm.BenchmarkSettings
import org.mobilemm.Bundle
import org.mobilemm.Device
import org.mobilemm.Figure
import org.mobilemm.Json
import org.mobilemm.MobileMMError
import org.mobilemm.Raster
import java.io.ByteArrayOutputStream
import java.io.File
import java.io.IOException
import java.util.Random

/** The benchmark that is under way, and the last one's result; of the main thread. */
class Benchmarks(private val context: Context, private val models: Models, private val chat: Chat) {
    private val main = Handler(Looper.getMainLooper())
    private val listeners = LinkedHashSet<() -> Unit>()

    @Volatile private var benchmark: Benchmark? = null

    var isRunning = false
        private set
    var status: String? = null
        private set
    var figures: List<Figure> = emptyList()
        private set
    var json: String? = null
        private set

    fun listen(listener: () -> Unit) = listeners.add(listener)

    fun unlisten(listener: () -> Unit) = listeners.remove(listener)

    fun cancel() {
        benchmark?.backend?.cancel()
    }

    /** Measures the bundle in use, with no other model in memory; `out` is a file's name. */
    fun start(
        settings: BenchmarkSettings,
        out: String,
    ) {
        if (isRunning) return
        isRunning = true
        figures = emptyList()
        chat.alone {
            val end =
                try {
                    measure(settings, out)
                } catch (error: MobileMMError) {
                    Log.e(TAG, "failed: ${error.message}")
                    error.message ?: ""
                } catch (error: IOException) {
                    Log.e(TAG, "failed: ${error.message}")
                    "$out: cannot be written"
                }
            main.post {
                isRunning = false
                tell(end)
            }
        }
    }

    private fun measure(
        settings: BenchmarkSettings,
        out: String,
    ): String {
        if (models.hasPacked()) models.unpack()
        val name = models.chosen ?: throw MobileMMError(context.getString(R.string.no_model))
        val bundle = Bundle.open(models.library.folder(name))
        val device = Phone(context)
        val measuring = Benchmark(bundle, settings, device).also { benchmark = it }
        val result = measuring.run { step -> main.post { tell(step) } }
        val text = Json.write(listOf(result), indent = 1) + "\n"
        val folder = context.getExternalFilesDir(null) ?: context.filesDir
        val draft = File(folder, ".$out.part")
        draft.writeText(text)
        val file = File(folder, out)
        if (!draft.renameTo(file)) throw IOException("rename")
        val found = measuring.found
        main.post {
            figures = found
            json = text
        }
        Log.i(TAG, "done ${file.path} " + found.filter { it.unit == "tok/s" }.joinToString(" ") { "%s=%.2f".format(java.util.Locale.ROOT, it.name, it.median) })
        return context.getString(R.string.benchmark_done, device.name, file.path)
    }

    private fun tell(text: String) {
        status = text
        listeners.toList().forEach { it() }
    }

    /** This device, for the benchmark. */
    private class Phone(context: Context) : Device {
        override val name = "${Build.MANUFACTURER} ${Build.MODEL}"
        override val system = "Android ${Build.VERSION.RELEASE} (API ${Build.VERSION.SDK_INT}) ${Build.SUPPORTED_ABIS.firstOrNull() ?: ""}"
        override val processor = "${Build.HARDWARE} ${Build.BOARD}"
        override val memory =
            ActivityManager.MemoryInfo().also {
                (context.getSystemService(Context.ACTIVITY_SERVICE) as ActivityManager).getMemoryInfo(it)
            }.totalMem

        override fun decode(encoded: ByteArray): Raster = Pictures.decode(encoded)

        override fun photograph(seed: Int): ByteArray {
            val draw = Random(seed.toLong())
            val pixels =
                IntArray(WIDTH * HEIGHT) { index ->
                    val light = 200 * (index / WIDTH) / HEIGHT + 55 * (index % WIDTH) / WIDTH + draw.nextInt(24)
                    0xff shl 24 or minOf(light, 255) * 0x010101
                }
            val bitmap = Bitmap.createBitmap(pixels, WIDTH, HEIGHT, Bitmap.Config.ARGB_8888)
            return ByteArrayOutputStream().also { bitmap.compress(Bitmap.CompressFormat.JPEG, 90, it) }.toByteArray()
        }

        private companion object {
            const val WIDTH = 1280
            const val HEIGHT = 960
        }
    }

    companion object {
        const val TAG = "MobileMMBench"
    }
}

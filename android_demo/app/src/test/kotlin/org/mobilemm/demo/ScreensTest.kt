package org.mobilemm.demo

import android.app.Activity
import android.app.AlertDialog
import android.content.ComponentCallbacks2
import android.content.ContentProvider
import android.content.ContentValues
import android.content.Context
import android.content.Intent
import android.content.res.Configuration
import android.graphics.Bitmap
import android.graphics.Canvas
import android.net.Uri
import android.os.BatteryManager
import android.os.Looper
import android.provider.MediaStore
import android.view.View
import android.view.ViewGroup
import android.widget.Button
import android.widget.EditText
import android.widget.ImageButton
import android.widget.ImageView
import android.widget.LinearLayout
import android.widget.TextView
import org.junit.After
import org.junit.Assert.assertArrayEquals
import org.junit.Assert.assertEquals
import org.junit.Assert.assertFalse
import org.junit.Assert.assertNotNull
import org.junit.Assert.assertTrue
import org.junit.Before
import org.junit.Test
import org.junit.runner.RunWith
import org.mobilemm.Bundle
import org.mobilemm.Json
import org.robolectric.Robolectric
import org.robolectric.RobolectricTestRunner
import org.robolectric.RuntimeEnvironment
import org.robolectric.Shadows.shadowOf
import org.robolectric.android.controller.ActivityController
import org.robolectric.annotation.Config
import org.robolectric.annotation.GraphicsMode
import org.robolectric.shadows.ShadowAlertDialog
import org.robolectric.shadows.ShadowToast
import java.io.ByteArrayOutputStream
import java.io.File
import java.util.zip.ZipEntry
import java.util.zip.ZipOutputStream

/** The app's screens on Android's own framework code, with the real model behind them. */
@RunWith(RobolectricTestRunner::class)
@Config(sdk = [35], qualifiers = PHONE)
@GraphicsMode(GraphicsMode.Mode.NATIVE)
class ScreensTest {
    private val vectors = File(System.getProperty("mobilemm.vectors")!!)
    private val source = File(System.getProperty("mobilemm.bundle")!!)
    private val app get() = RuntimeEnvironment.getApplication() as DemoApplication
    private val folder get() = app.models.library.folder

    @Before fun installModel() {
        // As an import leaves it. What the app brings itself is unpacked in another test.
        source.copyRecursively(File(folder, "mobilemm-default"))
    }

    @After fun letGo() {
        app.chat.stop()
        app.chat.alone {}
        shadowOf(Looper.getMainLooper()).idle()
    }

    // --- driving -------------------------------------------------------------------------------------------

    private fun until(
        what: String,
        seconds: Int = 120,
        met: () -> Boolean,
    ) {
        val end = System.nanoTime() + seconds * 1_000_000_000L
        while (!met()) {
            assertTrue("$what: ${app.chat.phase} ${app.imports.state}", System.nanoTime() < end)
            Thread.sleep(5)
            shadowOf(Looper.getMainLooper()).idle()
        }
    }

    private fun chat(): ActivityController<ChatActivity> {
        val controller = Robolectric.buildActivity(ChatActivity::class.java).setup()
        until("the model is open") { !app.chat.isBusy }
        return controller
    }

    private fun Activity.status() = findViewById<TextView>(R.id.status).text.toString()

    private fun Activity.texts(): List<String> {
        val list = findViewById<LinearLayout>(R.id.messages)
        return (0 until list.childCount).map { list.getChildAt(it).findViewById<TextView>(R.id.text).text.toString() }
    }

    private fun Activity.ask(text: String) {
        findViewById<EditText>(R.id.question).setText(text)
        findViewById<ImageButton>(R.id.send).performClick()
    }

    private fun pick(
        activity: ChatActivity,
        picture: File,
    ) {
        activity.findViewById<ImageButton>(R.id.picture).performClick()
        assertEquals(Intent.ACTION_GET_CONTENT, shadowOf(activity).nextStartedActivity.action)
        val uri = Uri.parse("content://pictures/${picture.name}")
        shadowOf(app.contentResolver).registerInputStream(uri, picture.inputStream())
        activity.onActivityResult(ChatActivity.PICK, Activity.RESULT_OK, Intent().setData(uri))
    }

    /** A picture of the screen, for README.md and for whoever looks. */
    private fun capture(
        activity: Activity,
        name: String,
    ) {
        shadowOf(Looper.getMainLooper()).idle()
        val view = activity.window.decorView
        val bitmap = Bitmap.createBitmap(view.width, view.height, Bitmap.Config.ARGB_8888)
        view.draw(Canvas(bitmap))
        val target = File(System.getProperty("mobilemm.screens") ?: return, "$name.png")
        target.parentFile!!.mkdirs()
        target.outputStream().use { bitmap.compress(Bitmap.CompressFormat.PNG, 100, it) }
    }

    private val answers get() = Json.parse(File(vectors, "answers.json").readBytes()) as Map<*, *>

    private fun pictureCase(index: Int) = (answers["pictures"] as List<*>)[index] as Map<*, *>

    // --- tests ---------------------------------------------------------------------------------------------

    @Test fun `the first start checks the model, and a question about a picture is answered as in Python`() {
        val activity = chat().get()
        assertTrue(app.models.isChecked(Bundle.open(File(folder, "mobilemm-default"))))
        assertEquals(listOf(app.getString(R.string.welcome)), activity.texts())
        val case = pictureCase(0)
        pick(activity, File(vectors, "pictures/${case["image"]}"))
        assertEquals(View.VISIBLE, activity.findViewById<View>(R.id.pending_scroll).visibility)
        activity.ask(case["question"] as String)
        assertTrue(app.chat.isBusy)
        until("the answer") { app.chat.phase is Phase.Answered }
        assertEquals(listOf(case["question"], case["text"]), activity.texts())
        assertTrue(activity.status(), "tokens/s" in activity.status())
        assertEquals(View.GONE, activity.findViewById<View>(R.id.pending_scroll).visibility)
        capture(activity, "chat")
    }

    @Test fun `the bundle that the app brings is unpacked, checked and used`() {
        File(folder, "mobilemm-default").deleteRecursively()
        val activity = chat().get()
        assertEquals(activity.status(), Phase.Idle, app.chat.phase)
        assertEquals(listOf("mobilemm-default"), app.models.library.names())
        Bundle.open(File(folder, "mobilemm-default"))
        // Once deleted, it does not come back by itself.
        app.models.library.delete("mobilemm-default")
        app.chat.release()
        activity.ask("Hello?")
        until("the answer that there is no model") { app.chat.phase is Phase.Failed }
        assertEquals(app.getString(R.string.no_model), activity.status())
        assertEquals(listOf(app.getString(R.string.welcome)), activity.texts())
    }

    @Test fun `an answer goes on while the screen is rotated, and can be stopped`() {
        val controller = chat()
        var activity = controller.get()
        activity.ask("Tell me a long story about a house.")
        until("some words") { app.chat.messages.lastOrNull()?.text.orEmpty().length > 30 }
        val before = app.chat.messages.last().text
        val turned = Configuration(activity.resources.configuration)
        turned.orientation = Configuration.ORIENTATION_LANDSCAPE
        RuntimeEnvironment.setQualifiers("+land")
        controller.configurationChange(turned).visible()
        activity = controller.get()
        assertTrue(app.chat.isBusy)
        until("more words") { app.chat.messages.last().text.length > before.length + 20 }
        assertTrue(activity.texts().last().startsWith(before))
        assertEquals(app.getString(R.string.stop), activity.findViewById<View>(R.id.send).contentDescription)
        capture(activity, "chat-landscape")
        activity.findViewById<ImageButton>(R.id.send).performClick()
        until("the stop", seconds = 5) { app.chat.phase is Phase.Answered }
        assertTrue((app.chat.phase as Phase.Answered).stopped)
        val said = app.chat.messages.last().text
        assertTrue(said.length < 1500)
        activity.ask("And then?")
        until("the next answer") { app.chat.messages.size == 4 && app.chat.messages.last().text.length > 10 }
        assertEquals(said, app.chat.messages[1].text)
        app.chat.stop()
        until("the end") { !app.chat.isBusy }
    }

    @Suppress("DEPRECATION")
    @Test fun `process death and low memory lose nothing that was said`() {
        val controller = chat()
        val activity = controller.get()
        val turns = ((answers["conversations"] as List<*>)[0] as Map<*, *>)["turns"] as List<*>
        val picture = ((turns[0] as Map<*, *>)["images"] as List<*>)[0] as String
        pick(activity, File(vectors, "pictures/$picture"))
        activity.ask("What is this?")
        until("the answer") { app.chat.phase is Phase.Answered }
        val said = app.chat.messages
        app.onTrimMemory(ComponentCallbacks2.TRIM_MEMORY_RUNNING_CRITICAL)
        activity.ask("Why?")
        until("the next answer") { app.chat.messages.size == 4 && app.chat.phase is Phase.Answered }
        val all = app.chat.messages
        assertEquals(said, all.take(2))
        controller.pause().stop()
        // What a new process reads is what the old one has written, and nothing else.
        val again = Chat(app, app.models)
        assertEquals(all, again.messages)
        val asked = ArrayList<String>()
        again.listen { asked += again.phase.toString() }
        again.ask("Are you sure?")
        until("the answer after the restart") { again.phase is Phase.Answered || again.phase is Phase.Failed }
        assertTrue(asked.toString(), again.phase is Phase.Answered)
        assertEquals(6, again.messages.size)
        // All that was said before was read again, the picture included.
        assertTrue((again.phase as Phase.Answered).stats.promptTokens > 60)
        again.alone {}
    }

    @Test fun `a damaged bundle is refused with a clear message, a whole one is taken`() {
        val controller = Robolectric.buildActivity(ModelsActivity::class.java).setup()
        val activity = controller.get()
        capture(activity, "models")
        val tiny = File(vectors, "tiny-onnx")
        importZip(activity, "tiny.zip", zip(tiny) { name, bytes -> if (name.endsWith("tokenizer.json")) bytes + 1 else bytes })
        until("the refusal") { app.imports.state is Imports.State.Failed }
        assertTrue(activity.status(), "tokenizer.json" in activity.status() && "manifest says" in activity.status())
        assertEquals(listOf("mobilemm-default"), app.models.library.names())
        importZip(activity, "tiny.zip", zip(tiny) { _, bytes -> bytes })
        until("the import") { app.imports.state is Imports.State.Done }
        assertEquals(listOf("mobilemm-default", "tiny"), app.models.library.names())
        assertEquals("tiny", app.models.chosen)
        val rows = activity.findViewById<LinearLayout>(R.id.list)
        assertEquals(2, rows.childCount)
        capture(activity, "models-imported")
        rows.getChildAt(1).findViewById<Button>(R.id.delete).performClick()
        ShadowAlertDialog.getLatestDialog().let { (it as AlertDialog).getButton(AlertDialog.BUTTON_POSITIVE).performClick() }
        until("it is gone") { app.models.library.names() == listOf("mobilemm-default") && app.imports.state is Imports.State.Idle }
        activity.importLink("https://")
        until("the bad link is told") { app.imports.state is Imports.State.Failed }
    }

    private fun importZip(
        activity: ModelsActivity,
        name: String,
        bytes: ByteArray,
    ) {
        activity.findViewById<Button>(R.id.import_file).performClick()
        assertEquals(Intent.ACTION_OPEN_DOCUMENT, shadowOf(activity).nextStartedActivity.action)
        val uri = Uri.parse("content://documents/$name")
        shadowOf(app.contentResolver).registerInputStream(uri, bytes.inputStream())
        activity.onActivityResult(ModelsActivity.OPEN, Activity.RESULT_OK, Intent().setData(uri))
    }

    private fun zip(
        folder: File,
        change: (String, ByteArray) -> ByteArray,
    ) = ByteArrayOutputStream().also { out ->
        ZipOutputStream(out).use { zip ->
            for (file in folder.walk().filter { it.isFile }) {
                zip.putNextEntry(ZipEntry(file.relativeTo(folder).path))
                zip.write(change(file.name, file.readBytes()))
                zip.closeEntry()
            }
        }
    }.toByteArray()

    @Test fun `the self-check gives its verdict`() {
        val activity = Robolectric.buildActivity(CheckActivity::class.java).setup().get()
        until("the verdict") { activity.findViewById<TextView>(R.id.verdict).text == app.getString(R.string.check_passed) }
        val lines = activity.findViewById<TextView>(R.id.checks).text.lines()
        val manifest = Bundle.readManifest(source)
        assertEquals(manifest.golden.size + manifest.conversations.size, lines.size)
        assertTrue(lines.toString(), lines.all { it.startsWith("✓") })
        capture(activity, "check")
    }

    @Test fun `a benchmark that adb starts writes its result, and draws it`() {
        val intent =
            Intent(app, BenchmarkActivity::class.java)
                .putExtra("run", true)
                .putExtra("prompt_tokens", 32)
                .putExtra("new_tokens", 8)
                .putExtra("runs", 1)
                .putExtra("out", "../result.json")
        val activity = Robolectric.buildActivity(BenchmarkActivity::class.java, intent).setup().get()
        until("the result") { !app.benchmarks.isRunning }
        val file = File(app.getExternalFilesDir(null), "result.json")
        val result = (Json.parse(file.readBytes()) as List<*>)[0] as Map<*, *>
        val names = (result["figures"] as List<*>).map { (it as Map<*, *>)["name"] }
        assertTrue(names.toString(), names.containsAll(listOf("load_warm", "vision", "ttft", "pp32", "tg8")))
        assertTrue(activity.findViewById<View>(R.id.share).isEnabled)
        assertTrue("ms" in activity.findViewById<View>(R.id.chart).contentDescription)
        capture(activity, "benchmark")
    }

    private fun measured(
        bundle: String,
        out: String,
    ): Map<*, *>? {
        val intent =
            Intent(app, BenchmarkActivity::class.java)
                .putExtra("run", true)
                .putExtra("bundle", bundle)
                .putExtra("prompt_tokens", 8)
                .putExtra("new_tokens", 32)
                .putExtra("runs", 2)
                .putExtra("out", out)
        Robolectric.buildActivity(BenchmarkActivity::class.java, intent).setup()
        until("the end") { !app.benchmarks.isRunning }
        val file = File(app.getExternalFilesDir(null), out)
        return if (file.exists()) (Json.parse(file.readBytes()) as List<*>)[0] as Map<*, *> else null
    }

    @Suppress("DEPRECATION")
    @Test fun `a bundle that a computer has put there is measured by its name, its energy by the battery`() {
        app.sendStickyBroadcast(
            Intent(Intent.ACTION_BATTERY_CHANGED)
                .putExtra(BatteryManager.EXTRA_PLUGGED, 0)
                .putExtra(BatteryManager.EXTRA_VOLTAGE, 4000)
                .putExtra(BatteryManager.EXTRA_TEMPERATURE, 315),
        )
        val battery = app.getSystemService(Context.BATTERY_SERVICE) as BatteryManager
        shadowOf(battery).setIntProperty(BatteryManager.BATTERY_PROPERTY_CURRENT_NOW, -1_500_000)
        app.benchmarks.files.create()
        val files = app.getExternalFilesDir(null)!!
        val copy = File(files, "bench/tiny")
        File(vectors, "tiny-onnx").copyRecursively(copy)
        val result = measured("tiny", "adb.json")!!
        assertEquals(Bundle.sha256(copy, Bundle.MANIFEST), (result["bundle"] as Map<*, *>)["digest"])
        assertFalse(File(files, "adb.json.state").exists())
        val runs = (result["figures"] as List<*>).map { it as Map<*, *> }.associate { it["name"] to it["runs"] as List<*> }
        // 6 W for as long as a token takes; in one of the runs no other process may have come between two clocks.
        val watts = runs.getValue("energy").zip(runs.getValue("tg32")) { joules, rate -> joules as Double * rate as Double }
        assertTrue(watts.all { it >= 6 * 0.999 })
        assertTrue(watts.min() < 12)
        val before = (result["machine"] as Map<*, *>)["before"] as Map<*, *>
        assertEquals(31.5, (before["celsius"] as Map<*, *>)["battery"])
        // What was measured before does not stand for what could not be.
        assertEquals(null, measured("../bench/tiny", "adb.json"))
        assertEquals("failed: '../bench/tiny': is no name for a bundle\n", File(files, "adb.json.state").readText())
        File(copy, "tokenizer.json").appendText(" ")
        assertEquals(null, measured("tiny", "adb.json"))
        assertTrue("tokenizer.json" in File(files, "adb.json.state").readText())
    }

    @Test fun `the camera writes into the file that it was granted`() {
        val activity = chat().get()
        activity.findViewById<ImageButton>(R.id.camera).performClick()
        val intent = shadowOf(activity).nextStartedActivity
        @Suppress("DEPRECATION")
        val uri = intent.getParcelableExtra<Uri>(android.provider.MediaStore.EXTRA_OUTPUT)!!
        val provider = Robolectric.buildContentProvider(PictureProvider::class.java).create("org.mobilemm.demo.pictures").get()
        provider.openFile(uri, "w").use { opened ->
            java.io.FileOutputStream(opened.fileDescriptor).use { it.write(File(vectors, "pictures/1.png").readBytes()) }
        }
        activity.onActivityResult(ChatActivity.TAKE, Activity.RESULT_OK, null)
        assertEquals(1, app.chat.pending.size)
        for (name in listOf("../conversation.json", "conversation.json", "..%2Fx.picture")) {
            val outside = Uri.parse("content://org.mobilemm.demo.pictures/$name")
            assertTrue(name, runCatching { provider.openFile(outside, "r") }.exceptionOrNull() is java.io.FileNotFoundException)
        }
        activity.findViewById<LinearLayout>(R.id.pending).getChildAt(0).performClick()
        assertEquals(0, app.chat.pending.size)
    }

    // --- drawing -------------------------------------------------------------------------------------------

    /** What draws: the default model where it does, else the tiny one; with its request, and Python's answer to it. */
    private fun drawer(): Map<*, *> {
        val default = File(vectors, "drawings")
        val tiny = File(System.getProperty("mobilemm.drawing")!!)
        if (!default.isDirectory) {
            File(tiny, "drawer-onnx").copyRecursively(File(folder, "drawer"))
            app.models.chosen = "drawer"
        }
        return (Json.parse(File(if (default.isDirectory) default else tiny, "drawings.json").readBytes()) as List<*>)[0] as Map<*, *>
    }

    private fun Activity.drawings() = views(window.decorView).filterIsInstance<ImageView>().filter { "Seed" in (it.contentDescription ?: "") }

    /** The tiny model goes on with one drawing after the other; a real one ends by itself. */
    private fun stopBehindADrawing() {
        if (app.models.chosen == "drawer") app.chat.listen { if (app.chat.messages.let { it.size == 2 && it[1].drawings.isNotEmpty() }) app.chat.stop() }
    }

    private fun offered(view: View): AlertDialog {
        view.performClick()
        return ShadowAlertDialog.getLatestDialog() as AlertDialog
    }

    @Test fun `a drawing that is made step by step is shown as it comes`() {
        val steps = File(System.getProperty("mobilemm.drawing")!!, "stepwise")
        File(steps, "drawer-onnx").copyRecursively(File(folder, "drawer"))
        app.models.chosen = "drawer"
        val request = ((Json.parse(File(steps, "drawings.json").readBytes()) as List<*>)[0] as Map<*, *>)["question"] as String
        val activity = chat().get()

        fun sketches() = views(activity.window.decorView).count { it is ImageView && it.contentDescription == app.getString(R.string.drawing) }
        val seen = ArrayList<Int>()
        app.chat.listen { if ((app.chat.phase as? Phase.Busy)?.sketch != null) seen += sketches() }
        stopBehindADrawing()
        activity.ask(request)
        until("the drawing") { app.chat.phase is Phase.Answered }
        assertEquals(listOf(1, 1, 1), seen.take(3))
        assertEquals(0, sketches())
        assertTrue(activity.drawings().isNotEmpty())
    }

    @Test fun `what is asked for is drawn, and can be saved and shared`() {
        val request = drawer()["question"] as String
        val controller = chat()
        var activity = controller.get()
        val states = LinkedHashSet<String>()
        app.chat.listen { states += activity.status() }
        stopBehindADrawing()
        activity.ask(request)
        until("the drawing") { app.chat.phase is Phase.Answered }
        assertTrue("$states", app.getString(R.string.drawing) in states)
        assertTrue(activity.status(), "drawn in " in activity.status())
        val drawing = app.chat.messages[1].drawings[0]
        assertTrue(activity.texts().toString(), app.getString(R.string.seed, drawing.seed) in activity.texts())
        assertFalse(activity.texts().any { "[IMG" in it })
        val view = activity.drawings()[0]
        assertEquals(app.getString(R.string.drawn, request, drawing.seed), view.contentDescription)
        val labels = view.createAccessibilityNodeInfo().actionList.mapNotNull { it.label }
        assertTrue("$labels", app.getString(R.string.save_or_share) in labels)
        assertTrue(view.isClickable && view.width == view.height && view.width > 200)
        capture(activity, "drawing")

        val file = app.chat.pictureFile(drawing.file)
        val gallery = Robolectric.buildContentProvider(Gallery::class.java).create(MediaStore.AUTHORITY).get()
        val saved = ByteArrayOutputStream()
        shadowOf(app.contentResolver).registerOutputStream(Gallery.PLACE, saved)
        shadowOf(offered(view)).clickOnItem(0)
        assertEquals(app.getString(R.string.saved), ShadowToast.getTextOfLatestToast())
        assertArrayEquals(file.readBytes(), saved.toByteArray())
        assertEquals("mobilemm-${drawing.seed}.png", gallery.values.getAsString(MediaStore.Images.Media.DISPLAY_NAME))
        assertEquals(0, gallery.values.getAsInteger(MediaStore.Images.Media.IS_PENDING))
        shadowOf(offered(view)).clickOnItem(1)
        @Suppress("DEPRECATION")
        val sent = shadowOf(activity).nextStartedActivity.getParcelableExtra<Intent>(Intent.EXTRA_INTENT)!!
        assertEquals("image/png", sent.type)
        @Suppress("DEPRECATION")
        val uri = sent.getParcelableExtra<Uri>(Intent.EXTRA_STREAM)!!
        val provider = Robolectric.buildContentProvider(PictureProvider::class.java).create("org.mobilemm.demo.pictures").get()
        assertEquals("image/png", provider.getType(uri))
        val read = provider.openFile(uri, "r").use { java.io.FileInputStream(it.fileDescriptor).readBytes() }
        assertArrayEquals(file.readBytes(), read)

        val turned = Configuration(activity.resources.configuration)
        turned.orientation = Configuration.ORIENTATION_LANDSCAPE
        RuntimeEnvironment.setQualifiers("+land")
        controller.configurationChange(turned).visible()
        activity = controller.get()
        assertEquals(app.chat.messages[1].drawings.size, activity.drawings().size)
    }

    @Suppress("DEPRECATION")
    @Test fun `a drawing survives the process, and what is said after it is as if it had never ended`() {
        val request = drawer()["question"] as String
        val controller = chat()
        val activity = controller.get()
        stopBehindADrawing()
        activity.ask(request)
        until("the drawing") { app.chat.phase is Phase.Answered }
        val kept = app.chat.messages
        controller.pause().stop()
        val again = Chat(app, app.models)
        assertEquals(kept, again.messages)
        assertTrue(again.messages[1].drawings.isNotEmpty())
        assertTrue("[IMG0]" in again.messages[1].memory)
        for (chat in listOf(app.chat, again)) {
            chat.listen { if (chat.messages.size == 4 && chat.messages[3].drawings.size == 2) chat.stop() }
            chat.ask("What")
            until("the next answer") { chat.phase is Phase.Answered && chat.messages.size == 4 }
        }
        fun said(chat: Chat) = chat.messages[3].memory.substringBefore("[IMG2][")
        assertEquals(said(app.chat), said(again))
        again.clear()
        until("all is forgotten") { app.filesDir.resolve("conversation").list()!!.none { it.endsWith(Chat.DRAWING) } }
        again.alone {}
    }

    @Test fun `a stop while it draws leaves what was said`() {
        val request = drawer()["question"] as String
        val activity = chat().get()
        app.chat.listen { if (app.chat.phase == Phase.Busy(R.string.drawing)) app.chat.stop() }
        activity.ask(request)
        until("the end") { app.chat.phase is Phase.Answered }
        val phase = app.chat.phase as Phase.Answered
        assertTrue(phase.stopped)
        // The tiny model may have drawn before the stop came; nothing is left half.
        for (drawing in app.chat.messages.flatMap { it.drawings }) assertNotNull(Pictures.thumbnail(app.chat.pictureFile(drawing.file), 64))
        assertFalse(app.chat.isBusy)
    }

    @Test fun `an answer with drawings is shown in its order, and remembered in it`() {
        fun drawing(
            at: Int,
            seed: String,
        ) = ChatDrawing("$seed.png", at, seed, "draw", "[$seed]")
        val message = ChatMessage("assistant", "one two", drawings = listOf(drawing(0, "a"), drawing(3, "b"), drawing(3, "c"), drawing(7, "d")))
        assertEquals("[a]one[b][c] two[d]", message.memory)
        val shown = message.lines.map { line -> line.text + line.drawings.joinToString { it.seed } }
        assertEquals(listOf("a", "one", "b", "c", " two", "d"), shown)
    }

    @Test fun `what is no picture is told`() {
        val activity = chat().get()
        pick(activity, File(vectors, "answers.json"))
        assertEquals(app.getString(R.string.picture_failed), ShadowToast.getTextOfLatestToast())
        assertEquals(0, app.chat.pending.size)
    }

    @Config(qualifiers = DARK_PHONE)
    @Test fun `all that can be touched is named, and is large enough`() {
        for (activity in listOf(chat().get(), Robolectric.buildActivity(ModelsActivity::class.java).setup().get())) {
            val density = activity.resources.displayMetrics.density
            for (view in views(activity.window.decorView)) {
                if (!view.isClickable || view.visibility != View.VISIBLE || view.width == 0 || view.id == View.NO_ID) continue
                if (view.resources.getResourcePackageName(view.id) != "org.mobilemm.demo") continue
                val named = !view.contentDescription.isNullOrEmpty() || (view as? TextView)?.let { it.text.isNotEmpty() || it.hint != null } == true
                assertTrue(view.toString(), named)
                assertTrue("$view", view.height >= 48 * density - 1)
            }
        }
        val activity = chat().get()
        val colors = listOf(R.color.text, R.color.background).map { activity.getColor(it) }
        assertFalse(colors[0] == colors[1])
        assertTrue("dark", android.graphics.Color.luminance(colors[1]) < 0.1)
        pick(activity, File(vectors, "pictures/2.png"))
        activity.ask("What is in this picture?")
        until("the answer") { app.chat.phase is Phase.Answered }
        capture(activity, "chat-dark")
        val pictures = views(activity.window.decorView).filterIsInstance<ImageView>().filter { it.drawable != null }
        assertNotNull(pictures.firstOrNull { it.contentDescription == app.getString(R.string.your_picture) })
    }

    private fun views(view: View): List<View> =
        listOf(view) + ((view as? ViewGroup)?.let { group -> (0 until group.childCount).flatMap { views(group.getChildAt(it)) } } ?: emptyList())
}

/** The system's gallery, which has one place, and what is said of the picture there. */
class Gallery : ContentProvider() {
    val values = ContentValues()

    override fun onCreate() = true

    override fun insert(
        uri: Uri,
        values: ContentValues?,
    ) = PLACE.also { this.values.putAll(values) }

    override fun update(
        uri: Uri,
        values: ContentValues?,
        selection: String?,
        selectionArgs: Array<String>?,
    ) = 1.also { this.values.putAll(values) }

    override fun query(
        uri: Uri,
        projection: Array<String>?,
        selection: String?,
        selectionArgs: Array<String>?,
        sortOrder: String?,
    ) = null

    override fun delete(
        uri: Uri,
        selection: String?,
        selectionArgs: Array<String>?,
    ) = 0

    override fun getType(uri: Uri) = "image/png"

    companion object {
        val PLACE: Uri = Uri.parse("content://media/external_primary/images/media/1")
    }
}

/** A phone of the common kind. */
private const val PHONE = "w393dp-h830dp-xhdpi"
private const val DARK_PHONE = "w393dp-h830dp-night-xhdpi"
